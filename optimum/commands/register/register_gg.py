"""Read by `optimum-cli`, which looks for commands of other packages in this folder: `optimum-cli gg …`.

No folder above may have an `__init__.py`: optimum is a namespace package.
"""

from hf_gg.cli.optimum import GGCommand


REGISTER_COMMANDS = [GGCommand]
