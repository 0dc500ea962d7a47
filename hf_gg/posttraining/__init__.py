"""Methods that improve a model that is trained already: `rif.py` filters instances by rollouts before GRPO."""
