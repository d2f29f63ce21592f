"""A small world to train in: real videos, encoders and an autoencoder, made by the demo's script."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
SMALL_MODEL = [
    *("--model.depth", "1", "--model.depth-single-blocks", "1"),
    *("--model.hidden-size", "48", "--model.num-heads", "2", "--model.axes-dim", "[8,8,8]"),
]
FEW_SAMPLES = ["--bucket-config", "{'64px': {1: (1.0, 6), 5: (1.0, 3), 9: (1.0, 4)}}"]


@dataclass(frozen=True)
class ShapesWorld:
    """A working directory with datasets/shapes_nec.csv (288 files) and ckpts/shapes, as the demo lays them out."""

    root: Path
    table: str = "datasets/shapes_nec.csv"

    def train_arguments(self, *more: str) -> list[str]:
        """Arguments of train.py for a run of a small model on this world."""
        config = str(REPOSITORY / "configs/diffusion/train/shapes.py")
        return [config, "--dataset.data-path", self.table, *SMALL_MODEL, *FEW_SAMPLES, "--log-every", "1", *more]

    def run(
        self, *command: str, ranks: int = 0, check: bool = True, timeout: float = 600, restarts: int = 0
    ) -> subprocess.CompletedProcess:
        """Run a script of the repository here as a user would; with `ranks`, under torchrun."""
        process = self.start(*command, ranks=ranks, restarts=restarts)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        if check:
            assert process.returncode == 0, f"{command} exited with {process.returncode}\n{out[-3000:]}\n{err[-3000:]}"
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def start(
        self, script: str, *arguments: str, ranks: int = 0, restarts: int = 0, log: Path | None = None
    ) -> subprocess.Popen:
        """With `log`, what it says goes there and not into pipes."""
        launcher = [sys.executable]
        if ranks:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
            launcher += ["--max-restarts", str(restarts)]
        command = [*launcher, str(REPOSITORY / script), *map(str, arguments)]
        others = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "WANDB_API_KEY", "WANDB_MODE")  # a user without a login
        environment = {k: v for k, v in os.environ.items() if k not in others}
        environment |= {"OMP_NUM_THREADS": "1", "NETRC": os.devnull, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        if log is not None:
            output = {"stdout": open(log, "w"), "stderr": subprocess.STDOUT}  # noqa: SIM115 - the process's own
        return subprocess.Popen(command, cwd=self.root, env=environment, text=True, **output)
