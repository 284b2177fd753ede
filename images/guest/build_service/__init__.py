"""The guest's build service, in parts; `build-service` beside this directory starts it."""
