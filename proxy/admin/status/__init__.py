"""The status page: its files, its state, and the stream that keeps it live."""

from proxy.admin.status.board import StatusBoard
from proxy.admin.status.files import PATHS as PAGE_PATHS
from proxy.admin.status.routes import EVENTS_PATH, StatusRoutes

__all__ = ["EVENTS_PATH", "PAGE_PATHS", "StatusBoard", "StatusRoutes"]
