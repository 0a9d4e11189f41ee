"""The command line on a processor without bfloat16 units, whatever this one has."""

from basis_select import cli
from basis_select.training import precision

if __name__ == "__main__":
    precision.fast_bf16 = lambda device: False
    cli.main()
