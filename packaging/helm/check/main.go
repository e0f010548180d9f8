// SPDX-License-Identifier: Apache-2.0

// Checks rendered manifests against the API types that they claim to be: every
// field must exist there and have its type. Reads YAML documents on standard
// input; prints each kind that it checked, or what is wrong, and ends with 1.
package main

import (
	"bufio"
	"fmt"
	"io"
	"os"

	monitoring "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	apps "k8s.io/api/apps/v1"
	core "k8s.io/api/core/v1"
	rbac "k8s.io/api/rbac/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/yaml"
	strict "sigs.k8s.io/yaml"
)

var kinds = map[string]func() any{
	"apps/v1/DaemonSet":                               func() any { return new(apps.DaemonSet) },
	"apps/v1/Deployment":                              func() any { return new(apps.Deployment) },
	"monitoring.coreos.com/v1/PodMonitor":             func() any { return new(monitoring.PodMonitor) },
	"monitoring.coreos.com/v1/PrometheusRule":         func() any { return new(monitoring.PrometheusRule) },
	"rbac.authorization.k8s.io/v1/ClusterRole":        func() any { return new(rbac.ClusterRole) },
	"rbac.authorization.k8s.io/v1/ClusterRoleBinding": func() any { return new(rbac.ClusterRoleBinding) },
	"rbac.authorization.k8s.io/v1/Role":               func() any { return new(rbac.Role) },
	"rbac.authorization.k8s.io/v1/RoleBinding":        func() any { return new(rbac.RoleBinding) },
	"v1/ConfigMap":                                    func() any { return new(core.ConfigMap) },
	"v1/ServiceAccount":                               func() any { return new(core.ServiceAccount) },
}

func main() {
	documents := yaml.NewYAMLReader(bufio.NewReader(os.Stdin))
	failed := false
	for {
		text, err := documents.Read()
		if err == io.EOF {
			break
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		var head struct {
			meta.TypeMeta   `json:",inline"`
			meta.ObjectMeta `json:"metadata"`
		}
		if err := strict.Unmarshal(text, &head); err != nil {
			fmt.Fprintln(os.Stderr, err)
			failed = true
			continue
		}
		if head.Kind == "" {
			continue // a document of comments
		}
		name := head.APIVersion + "/" + head.Kind
		make, known := kinds[name]
		if !known {
			fmt.Fprintf(os.Stderr, "%s %s: no type to check it against\n", name, head.Name)
			failed = true
			continue
		}
		if err := strict.UnmarshalStrict(text, make()); err != nil {
			fmt.Fprintf(os.Stderr, "%s %s: %v\n", name, head.Name, err)
			failed = true
			continue
		}
		fmt.Println(name, head.Name)
	}
	if failed {
		os.Exit(1)
	}
}
