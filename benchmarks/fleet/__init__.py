"""A simulation of routing on a virtual clock: Cairn's own index, fleet and plan beside other routers' rules."""
