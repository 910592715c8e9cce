"""Run a study or an ablation, or report earlier rows: `molecules` (if none is named), `text`, `ablation`, `report` or `cost`."""

import sys

from mlopt.errors import MloptError

from .command import main

try:
    sys.exit(main(sys.argv[1:]))
except (MloptError, OSError) as error:
    sys.exit(f"{error}")
