"""
What may go wrong from outside, one subject a file: arguments, files, numbers, resets, signals, worker processes. `transaction`
undoes what an update has changed so far, `training` is the one `with` that `learn` needs.

What a user sees of it. In each case the model is as after its last gradient step, and the next ``learn`` resets the
environments.

- An environment raises: its own exception, with a note that names the environment and the step of its episode (Python 3.11
  and later).
- A worker process of ``SubprocVecEnv`` or gymnasium's ``AsyncVectorEnv`` dies: a RuntimeError that names it and how it died.
  The others are stopped. Go on with new ones, ``model.set_env(env)``.
- NaN in an observation: a ValueError that names the environment and the step, before an action is taken on it.
- Infinity in an observation, NaN or infinity in a reward, the loss or the gradient: a ValueError that names the environment
  and the step, or the update, at the end of the episode at the latest. It never reaches the optimizer.
- NaN or infinity in a parameter, or numbers too large for the network: a ValueError before an action is taken. It names the
  parameter, or says that the numbers are too large.
- A schedule returns NaN, infinity or a number out of its range: a ValueError that names the update, which is not made.
- Ctrl-C, SIGTERM if Python handles it, an exception in a callback: passed on. In a terminal, Ctrl-C also ends the worker
  processes of ``SubprocVecEnv``, as in SB3: the next ``learn`` says so and asks for new ones.
- A callback resets the training environments: a warning, and their running episodes are dropped.
- A file is truncated, damaged, or of another network, algorithm or observation space: an error that says so. ``load`` makes no
  model, ``set_parameters`` loads all or nothing.
- The disk is full: an OSError. An earlier file of that name is as it was.
"""
