"""`python headroom_rank [WORDS]`: a rank, or `rank describe`; `python headroom_rank zygote FD`: the process that forks ranks."""

import os
import sys

# The user's modules come first, and this package is found under its name alone.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from headroom_rank import start  # noqa: E402

if __name__ == "__main__":
    if sys.argv[1:2] == ["zygote"]:
        from headroom_rank import zygote

        start.leave(zygote.serve(int(sys.argv[2])))
    start.leave(start.rank(sys.argv[1:]))
