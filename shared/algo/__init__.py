"""Pure functions of the off-policy correction. No IO."""
