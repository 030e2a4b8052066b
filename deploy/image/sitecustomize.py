"""Python runs this before anything else in the image.

The first process of a container gets only the signals that it asked for: without this a stop in the seconds in which libraries load
would be lost, and waited for until the container is killed. services/common/runtime.py takes over once it runs.
"""

import os
import signal

if os.getpid() == 1:
    signal.signal(signal.SIGTERM, lambda number, _frame: os._exit(128 + number))
