"""The pieces of a transformer: each native module with its tensor-parallel twin right below it."""
