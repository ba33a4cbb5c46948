"""Every setting of a run: the dataclasses, and what turns composed YAML into checked ones.

Hydra composes `conf/train.yaml`, its groups and the command line against the dataclasses of
`simpo.loss`, `inputs`, `backends`, `launchers` and `schema`. `check.build_run` turns the result
into plain objects, and `check.check_run` collects all faults into one `ConfigError`. This folder
imports no torch, so a typing mistake is answered in well under a second.
"""
