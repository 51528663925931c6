"""``streamworker completion``."""

from __future__ import annotations

import sys
from typing import Literal

from streamworker.cli.tree import root


def completion(shell: Literal["bash", "zsh", "fish"], /) -> int:
    """Print the completion script of a shell: source <(streamworker completion bash).

    Args:
        shell: Whose.
    """
    sys.stdout.write(root.generate_completion(shell=shell))
    return 0
