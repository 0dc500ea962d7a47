"""Methods that improve a model that is trained already: `roma.py` aligns the routers of mixtures of experts."""
