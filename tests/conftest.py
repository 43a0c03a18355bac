"""Settings of all tests."""

import torch

# On busy cores the threads of a pool wait for each other: 40 s in place of 0.3 s were seen.
torch.set_num_threads(1)
