{{/* Names and labels. Every template gets a scope: dict "root" $ "role" "env_agents". */}}

{{- define "lagwise.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* <release>-lagwise, or the release's name when it says lagwise already. At most 40 characters, room
     for a suffix; a longer one ends in a digest of the whole, so that no two releases share it. */}}
{{- define "lagwise.fullname" -}}
{{- $name := .Values.fullnameOverride | default (ternary .Release.Name (printf "%s-%s" .Release.Name (include "lagwise.name" .)) (contains (include "lagwise.name" .) .Release.Name)) -}}
{{- if gt (len $name) 40 -}}
{{- $name = printf "%s-%s" ($name | trunc 31 | trimSuffix "-") ($name | sha256sum | trunc 8) -}}
{{- end -}}
{{- $name | trimSuffix "-" -}}
{{- end -}}

{{/* A role as Kubernetes spells it: env_agents -> env-agents. */}}
{{- define "lagwise.component" -}}
{{- .role | replace "_" "-" -}}
{{- end -}}

{{- define "lagwise.objectName" -}}
{{- printf "%s-%s" (include "lagwise.fullname" .root) (include "lagwise.component" .) -}}
{{- end -}}

{{/* What selects the pods of one role of one release; never changes over upgrades. */}}
{{- define "lagwise.selectorLabels" -}}
app.kubernetes.io/name: {{ include "lagwise.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ include "lagwise.component" . }}
{{- end -}}

{{- define "lagwise.labels" -}}
{{ include "lagwise.selectorLabels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: lagwise
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "lagwise.metadata" -}}
name: {{ include "lagwise.objectName" . }}
labels:
  {{- include "lagwise.labels" . | nindent 2 }}
{{- end -}}

{{/* The image of a role; a digest wins over a tag. */}}
{{- define "lagwise.image" -}}
{{- $image := .root.Values.image -}}
{{- $own := (index .root.Values (.imageOf | default .role)).image | default dict -}}
{{- $component := .imageOf | default .role | replace "_" "-" | replace "deletionCost" "operator" -}}
{{- $repository := $own.repository | default (printf "%s/%s-%s" $image.registry $image.prefix $component) -}}
{{- if $own.digest -}}
{{- printf "%s@%s" $repository $own.digest -}}
{{- else -}}
{{- printf "%s:%s" $repository ($own.tag | default $image.tag | default .root.Chart.AppVersion) -}}
{{- end -}}
{{- end -}}
