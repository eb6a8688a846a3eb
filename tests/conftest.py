"""Settings that all tests share."""

import hypothesis
import torch as th

# The networks are tiny: more threads only wait for each other
th.set_num_threads(1)

# No test is about time: on a busy machine any of them may take long
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")
