"""Traces by OpenTelemetry. Imported only if `telemetry.endpoint` is set: without it no request pays anything.

The pipeline's collaborators are wrapped when a worker is built (`phases`), so that the pipeline itself knows of no
tracing. `attributes` decides what a span contains; `export` is the only module that configures the SDK.
"""
