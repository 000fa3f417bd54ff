"""The right that each method of the service asks for. This file owns the table; a method that is not in it is refused
to everyone, and a test holds it to be complete."""

from collections.abc import Mapping

from memory_service.domain.access import Right

# By the name of the method; the names of all services differ.
RIGHTS: Mapping[str, Right] = {
    # The service itself. GetStats shows each caller what is its own.
    "GetServerInfo": "known",
    "GetStats": "known",
    "WhoAmI": "known",
    # Of gRPC's own service, which tells tools the methods, where that is on.
    "ServerReflectionInfo": "known",
    "Compact": "operate",
    # Banks
    "GetBank": "read",
    "ListBanks": "read",
    "CreateBank": "write",
    "UpdateBank": "admin",
    "DeleteBank": "admin",
    "ReplaceBank": "admin",
    # Chunks
    "Retrieve": "read",
    "RetrieveFiles": "read",
    "FetchChunks": "read",
    "FetchFiles": "read",
    "GetChunk": "read",
    "ListChunks": "read",
    "WriteChunks": "write",
    "UpdateChunk": "write",
    "PinChunks": "write",
    "DeleteChunks": "write",
    # Evictions
    "ExplainEviction": "read",
    "ListEvictions": "read",
    # Sessions
    "GetSession": "read",
    "ListSessions": "read",
    "ListTurns": "read",
    "GetTurn": "read",
    "ReadWindow": "read",
    "CreateSession": "write",
    "UpdateSession": "write",
    "ForkSession": "write",
    "RewindSession": "write",
    "AcquireLease": "write",
    "RenewLease": "write",
    "ReleaseLease": "write",
    "AppendTurns": "write",
    "KeepWindow": "write",
    # What each of its targets asks for is said in `operations.forgetting`.
    "Forget": "forget",
    # Keys and tenants
    "CreateKey": "keys",
    "ListKeys": "keys",
    "RevokeKey": "keys",
    "RotateKey": "keys",
    "CreateTenant": "operate",
    "ListTenants": "operate",
    "SetTenantQuota": "operate",
    "DeleteTenant": "operate",
}
