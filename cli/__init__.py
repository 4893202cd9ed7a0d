"""The dolmen command. Reaches the cluster only through control.client."""
