"""The plan: everything that is decided before tensor data moves. `plan_merge` makes it, nothing here does IO.

nouns    MergePlan, Task, Unit, Result, Place …
inputs   a manifest's sources in one normal form
calls    parameters → numbers for one tensor
adapter  adapters → adapter
model    adapters and models → model
statistics  which of the statistics that users bring goes with which tensor
settle   ranks that follow from the data: two plans
notices  what users would not expect
model_files  config.json, and which tensor lies in which file
layout   files, headers, offsets
memory   what a task needs
build    plan_merge, check_machine, join_plans
summary  a plan for people and as JSON
"""
