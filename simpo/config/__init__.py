"""Every setting of a run: the dataclasses, and what turns composed YAML into checked ones.

Hydra composes `conf/train.yaml`, its groups and the command line against the dataclasses of
`simpo.loss` and of this folder, which `schema` puts together. `check.build_run` turns the result
into plain objects. `check.check_run` collects all faults into one `ConfigError`: those that the
`problems()` of each section yields as `key: rule, got value (remedy)`, where an exception in
`__post_init__` could report only the first, and those of `rules`, which cross sections. This folder
imports no torch, so a typing mistake is answered in well under a second.
"""
