"""What crosses between client and server: every request, response and event, as plain data.

One request is answered by one response on the same connection; what happens later comes as events,
pulled by sequence number.
"""

from kernel_server.protocol.messages.base import *  # noqa: F403
from kernel_server.protocol.messages.events import *  # noqa: F403
from kernel_server.protocol.messages.parts import *  # noqa: F403
from kernel_server.protocol.messages.records import *  # noqa: F403
from kernel_server.protocol.messages.requests import *  # noqa: F403
from kernel_server.protocol.messages.responses import *  # noqa: F403
