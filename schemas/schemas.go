// Package schemas embeds what other programs may rely on: protobuf, the
// columnar frame's specification, stream and bucket definitions, the JSON
// Schema of the plans file, ClickHouse migrations and the OpenAPI document.
// It depends on nothing.
package schemas

import "embed"

// Streams is streams.json: stream, KV and object bucket definitions in the
// form of the JetStream API.
//
//go:embed streams.json
var Streams []byte

// Plans is plans.schema.json, the JSON Schema of the plans file.
//
//go:embed plans.schema.json
var Plans []byte

// OpenAPI is openapi.yaml, the HTTP API of gateway and console.
//
//go:embed openapi.yaml
var OpenAPI []byte

// ClickHouse holds clickhouse/NNNN_name.sql, to be run in order.
//
//go:embed clickhouse/*.sql
var ClickHouse embed.FS
