"""The status page: its files, its state, and the stream that keeps it live."""

from proxy.admin.status.board import StatusBoard
from proxy.admin.status.files import PATHS as PAGE_PATHS
from proxy.admin.status.routes import StatusRoutes

__all__ = ["PAGE_PATHS", "StatusBoard", "StatusRoutes"]
