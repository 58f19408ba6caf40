"""The status page: its files, the state that it shows, and the stream by which it stays live."""

from proxy.status.board import Board
from proxy.status.files import PATHS as PAGE_PATHS
from proxy.status.routes import StatusRoutes

__all__ = ["PAGE_PATHS", "Board", "StatusRoutes"]
