"""Records of a study → tables, figures and a report. Imports `scaling.records` and no torch."""
