"""``python -m streamworker.embedded``: the supervisor. Started by ``acquire``, of no use by hand.

``acquire`` runs this file by its path under ``python -I -S``: isolated, so that neither the user's working directory
nor PYTHONPATH can slip modules of theirs under our imports, and without site-packages, which is faster. The package is
then found through a stub that points beside this file: the very code the user runs, without all that ``streamworker``
imports.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

if not __package__:
    stub = types.ModuleType("streamworker")
    stub.__path__ = [str(Path(__file__).resolve().parents[1])]
    sys.modules["streamworker"] = stub

from streamworker.embedded.supervisor import main

sys.exit(main(sys.argv[1:]))
