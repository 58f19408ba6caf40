"""Traces by OpenTelemetry. Imported only if `telemetry.endpoint` is set: without it requests have no overhead.

The pipeline's collaborators are wrapped when a worker is built (`phases`), so that the pipeline itself contains no
tracing. `attributes` decides what a span contains; `export` is the only module that configures the SDK.
"""
