"""What turns a module and a mesh into a distributed module; `compose` applies the strategies in the right order."""
