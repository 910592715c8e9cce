"""The page on several processes: its script prints the same in one process and, by torchrun, in two."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT, *_ = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "processes.md").read_text(), re.DOTALL)


def output(*arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for name in ("RANK", "WORLD_SIZE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=600, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_script_prints_the_same_in_two_processes(tmp_path: Path) -> None:
    script = tmp_path / "cleaning.py"
    script.write_text(SCRIPT)
    alone = output(str(script))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert output(*launcher, str(script)) == alone
    wrong, right = map(float, re.findall(r"-?\d+\.\d+", alone))
    assert wrong < -0.5 < 0.0 < right
