"""The ``cpu`` executor (executor.py): a Plan becomes flat numbers (lowering.py, by the rules of rules/) that csrc/cpu walks."""
