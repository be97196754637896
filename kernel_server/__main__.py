"""`python -m kernel_server`."""

import sys

from kernel_server.cli import main

sys.exit(main())
