"""Methods that improve a model that is trained already.

`roma.py` aligns the routers of mixtures of experts; `rif.py` filters instances by rollouts, and `continual.py` learns
tasks one after the other.
"""
