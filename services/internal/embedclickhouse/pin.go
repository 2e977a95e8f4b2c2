package embedclickhouse

import "encoding/json"

// The pin of the engine. deploy/engine holds the same pin as files, for people and scanners; a test
// keeps the two equal. The binary carries its own copy because it must be able to install the engine
// where there is no checkout.
const (
	// EngineVersion is the npm version of the pinned engine package.
	EngineVersion = "26.7.3-stable.1"

	// LibrarySHA256 is the hex SHA-256 of the unpacked libchdb.so of EngineVersion.
	LibrarySHA256 = "36ad4e999882821ef13cf2d0f52c93f48e6ee1b4498b35a201c23ce4b8d15bf5"

	enginePackage   = "@chdb/lib-linux-x64-gnu"
	engineIntegrity = "sha512-XP97mMqnc5tZpKQywR8N7cLTsHNiTmHr30pC5mzo3jWmukjKn2IBa60c2B/gWUNcuFjOMjWoorQICCqBVj5wpw=="
	libraryName     = "libchdb.so"
	librarySize     = 566_330_096
	// unpackedSize is the size in bytes of everything npm unpacks; the total of the progress.
	unpackedSize = 569_042_837

	pinName        = "tollkeeper-engine"
	pinVersion     = "1.0.0"
	pinLicense     = "Apache-2.0"
	pinDescription = "Pin of the embedded ClickHouse engine; installed by npm ci, never committed"
)

type pinManifest struct {
	Name         string            `json:"name"`
	Version      string            `json:"version"`
	Private      bool              `json:"private"`
	Dependencies map[string]string `json:"dependencies"`
	License      string            `json:"license"`
	Description  string            `json:"description"`
}

type pinLock struct {
	Name            string                    `json:"name"`
	Version         string                    `json:"version"`
	LockfileVersion int                       `json:"lockfileVersion"`
	Requires        bool                      `json:"requires"`
	Packages        map[string]pinLockPackage `json:"packages"`
}

type pinLockPackage struct {
	Name         string            `json:"name,omitempty"`
	Version      string            `json:"version"`
	Dependencies map[string]string `json:"dependencies,omitempty"`
	Integrity    string            `json:"integrity,omitempty"`
	CPU          []string          `json:"cpu,omitempty"`
	License      string            `json:"license,omitempty"`
	OS           []string          `json:"os,omitempty"`
}

func manifest() pinManifest {
	return pinManifest{
		Name: pinName, Version: pinVersion, Private: true,
		Dependencies: map[string]string{enginePackage: EngineVersion},
		License:      pinLicense, Description: pinDescription,
	}
}

// lock leaves `resolved` out on purpose: npm then asks the registry the user configured (a mirror,
// a proxy), and `integrity` alone decides what is accepted.
func lock() pinLock {
	return pinLock{
		Name: pinName, Version: pinVersion, LockfileVersion: 3, Requires: true,
		Packages: map[string]pinLockPackage{
			"": {Name: pinName, Version: pinVersion, License: pinLicense,
				Dependencies: map[string]string{enginePackage: EngineVersion}},
			"node_modules/" + enginePackage: {Version: EngineVersion, Integrity: engineIntegrity,
				CPU: []string{"x64"}, License: "Apache-2.0", OS: []string{"linux"}},
		},
	}
}

func pinFiles() (manifestJSON, lockJSON []byte, err error) {
	if manifestJSON, err = json.MarshalIndent(manifest(), "", "  "); err != nil {
		return nil, nil, err
	}
	if lockJSON, err = json.MarshalIndent(lock(), "", "  "); err != nil {
		return nil, nil, err
	}
	return manifestJSON, lockJSON, nil
}
