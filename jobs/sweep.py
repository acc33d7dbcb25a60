"""A run for every combination of [sweep.grid]: a Pareto table and plot, the best model of each budget.

    python -m jobs.sweep CONFIG.toml [dotted.key=value ...]
    ray job submit --working-dir . -- python -m jobs.sweep CONFIG.toml run.root=/shared/runs [key=value ...]

Started by ``ray job submit`` it runs on that cluster, otherwise on a private one on this machine. Interrupted, it
continues when started again.
"""

import sys

from cria_dist.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], until="sweep"))
