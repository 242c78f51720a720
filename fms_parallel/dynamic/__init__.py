"""Changing the layout of a running job: live re-layout, elastic membership."""
