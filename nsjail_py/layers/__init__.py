"""Layers at the level of Python: early and friendly messages, and honest reports of what they stop. The kernel is the boundary.

scan.py      looks at a script before it runs (rules.py says for what, examine.py how)
"""
