"""Attacks on the jail, one promise each. Every attack is first shown to work outside, on a canary that the test made; then it is tried
behind each wall that the promise names, and behind walls with single layers taken out, so that no layer hides another's failure.

runner.py has the two sides, the walls and what an attack is. An attack that is merely broken (a NameError, say) fails its test.
"""
