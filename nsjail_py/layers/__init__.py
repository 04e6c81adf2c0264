"""Layers at the level of Python: early and friendly messages, and honest reports of what they stop. The kernel is the boundary.

scan.py        looks at a script before it runs (rules.py says for what, examine.py how)
imports.py     proposes the list of imports that a script needs
report.py      runs the bypass catalogue (catalogue/) under each layer and under a policy; tables.py shows it. patterns.py,
               importhook.py and audithook.py are layers as applications have them, for comparison only
posture.py     what a policy comes to on this host: a level, and a row for each exposure (exposures.py)
restricted.py  expressions, templates and small programs held by RestrictedPython, in a jail (guards.py is what they get)
"""
