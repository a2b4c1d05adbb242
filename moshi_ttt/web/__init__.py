"""A host of conversations on the web: Moshi's websocket, the page, health, metrics, memories."""
