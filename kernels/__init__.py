"""Triton kernels, imported as ``fastmaml.kernels``: one module per op, ``<op>.py``, holding all of its modes.

A module here imports torch and triton only, never fastmaml, so that a kernel can be read, tested and timed alone; importing this package imports neither.

Every kernel runs all tasks in one launch: the last axis of its grid is the task. ``offsets`` [tasks + 1] says which rows are a task's; a program whose tile
lies behind the last of them does nothing, so tasks of different sizes need no padding. With ``offsets`` = [0, all rows] the rows of all tasks are those of
one, which is right wherever no operand is a task's own. ``<operand>_task``: numbers from one task's copy of an operand to the next; 0 where all share it.

A kernel may end in what is done next to its result: an activation (relu.activated) or an update of the inner loop (tiles.updated). Absent, they cost nothing.

Images lie as [row][h][w][channel], the weights of a convolution as [kh][kw][in][out]; everything else as the Plan has it. An absent operand is None.

Sums over rows are cut into chunks of a fixed number of rows, counted from the task's first: their order depends on the task alone. Nothing is added
atomically, and tiles are chosen by the shape of a layer, never by the size of a batch, so results of a task have the same bits in any batch.
"""
