"""A rehearsal on a GPU that isn't there: the trainer's step and drawing on tensors that only know where.

    python -m benchmarks.rehearsal                  # every mode on tiny models: devices, dtypes, shapes
    python -m benchmarks.rehearsal --full           # SDXL at 1024 px too: launches, and the memory of a step

It wants a CUDA build of torch, which needs no GPU and no driver for it; where there is none it says how to
make the environment, and does nothing. `FakeTensorMode` gives tensors with a device, a dtype and a shape, but
without numbers: a CPU tensor that meets a CUDA one raises (`fake`). Schedules and indices, on which code
branches, keep their numbers on every device (`known`).

What it can't tell: results, time, and what a driver is asked for (kernels' workspaces, memory in pieces).
Autograd's backward pass needs a driver, so the backward passes of this project's own functions are called one
by one (`step`); the evaluation's sharpness, which is nothing but backward passes, is left out. Launches are
counted on fake CPU tensors, with the whole backward pass (`full`).
"""
