"""Scenarios on the two node VMs: `python -m vagrant.scenarios [NAME...]`.

Each is a module with a docstring that says what must hold, and a function
`run(bed)` that raises ScenarioError when it does not. Each leaves the testbed
as it found it, or the next one says so.
"""
