"""The broker: holds work orders and episodes, durably. Payloads are opaque to it; no ML library is loaded."""
