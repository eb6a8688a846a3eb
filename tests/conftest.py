"""Settings that all tests share."""

import torch as th

# The networks are tiny: more threads only wait for each other
th.set_num_threads(1)
