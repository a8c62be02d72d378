"""The modules lie beside this folder, not in a package."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
