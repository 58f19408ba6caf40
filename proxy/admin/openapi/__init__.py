"""The OpenAPI documents of the client port and of the admin port."""

from proxy.admin.openapi.documents import PATHS as OPENAPI_PATHS
from proxy.admin.openapi.documents import document, encoded

__all__ = ["OPENAPI_PATHS", "document", "encoded"]
