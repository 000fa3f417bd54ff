"""One thread for the models of the golden tests."""

import torch

torch.set_num_threads(1)
