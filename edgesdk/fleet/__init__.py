"""Staged rollouts over a message broker: what devices run (`wire`, `store`, `device`, `agent`) and what drives them (`rollout`, `journal`, `controller`)."""
