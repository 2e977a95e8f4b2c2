package gateway

import (
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/gate/refusal"
	"github.com/tollkeeper/tollkeeper/services/gateway/internal/routes"
)

// Example is a commented configuration with every field.
var Example = routes.Example

// The configuration and its parts.
type (
	// Config is what the gateway's file says.
	Config = routes.Config
	// RouteConfig is one route.
	RouteConfig = routes.RouteConfig
	// ModelConfig says where a request names its model.
	ModelConfig = routes.ModelConfig
	// ClampConfig bounds the output of calls that do not say.
	ClampConfig = routes.ClampConfig
	// CORSConfig lets pages of other origins call.
	CORSConfig = routes.CORSConfig
	// ConfigError says what is wrong with a configuration, and where.
	ConfigError = routes.ConfigError
	// Duration is written as in "30s".
	Duration = routes.Duration
)

// Usage of RouteConfig.
const (
	UsageJSON = routes.UsageJSON
	UsageNone = routes.UsageNone
)

// Defaults of routes.
const (
	DefaultMaxModelBody               = routes.DefaultMaxModelBody
	DefaultTimeout      time.Duration = routes.DefaultTimeout
)

// SingleUpstream is the configuration of a gateway that sends everything to one
// upstream.
func SingleUpstream(route, upstream string, profile refusal.Profile) Config {
	return routes.SingleUpstream(route, upstream, profile)
}

// LoadConfig reads a configuration file.
func LoadConfig(file string) (Config, error) { return routes.Load(file) }

// ParseConfig reads a configuration; name stands for it in errors, which are
// *ConfigError, joined when there are several.
func ParseConfig(name string, data []byte) (Config, error) { return routes.Parse(name, data) }
