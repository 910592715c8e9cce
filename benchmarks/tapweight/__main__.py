"""Run a study, or report the rows of earlier ones: `molecules`, `text`, `report` or `cost`; molecules if none is named."""

import sys

from mlopt.errors import MloptError

from .command import main

try:
    sys.exit(main(sys.argv[1:]))
except (MloptError, OSError) as error:
    sys.exit(f"{error}")
